"""L3: checkpoints and their tokenizers, the model families as data, and the one decoder that runs them all."""
