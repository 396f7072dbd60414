"""Losses of identity training: diffusion, identity, alignment."""
