"""Trainings that learn one person from a few photos, as baselines: textual inversion, and DreamBooth with LoRA."""
