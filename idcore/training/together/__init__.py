"""All systems in one picture: what it costs, measured on tiny-sd and people that nobody trained on."""
