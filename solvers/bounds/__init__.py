"""What no schedule can beat: the least peak, the least time, and the program over instants that proves both."""
