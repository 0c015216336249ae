"""Drop-in modules: the names and signatures of other projects, on FastCache."""
