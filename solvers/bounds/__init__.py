"""What no schedule can beat: the least peak, the least time, and the programs that prove them."""
