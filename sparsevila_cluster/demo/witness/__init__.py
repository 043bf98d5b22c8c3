"""A second demo model, whose language model nobody trained for this: SmolLM2-135M-Instruct behind a vision tower of our own."""
