"""Parts of optim.py: Muon, and the steps that an optimizer skips."""
