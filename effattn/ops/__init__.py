"""One file an operator: what torch must know about it, and the choice of its backend."""
