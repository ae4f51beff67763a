"""The integer program of Checkmate, for small graphs: optimal, and the judge of everything else."""
