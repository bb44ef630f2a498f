"""How a small student and its benchmark are made: a synthetic world, its corpus, the training, the measurement."""
