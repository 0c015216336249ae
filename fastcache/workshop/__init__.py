"""What stands around the engine: sampling with schedulers, metrics, the shipped picture set, studies."""
