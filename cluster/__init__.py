"""Where it runs: Ray sessions, the pool of engine actors, trainers and data transforms. Knows nothing of tasks."""
