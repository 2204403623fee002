"""The demo: a real model, a verifiable task, a short warm-up, then GPO."""
