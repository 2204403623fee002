"""Ways into gpo-fast from other people's trainers."""
