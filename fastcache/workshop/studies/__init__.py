"""Studies of the shipped model: the demo and the quality run."""
