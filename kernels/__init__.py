"""Triton kernels of gpo-fast. They know nothing of models, trainers or rollouts."""
