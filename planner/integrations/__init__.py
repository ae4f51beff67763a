"""What the libraries people train with call by name, and which part of their models is planned."""
