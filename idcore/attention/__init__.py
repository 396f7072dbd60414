"""The only folder that knows diffusers' models."""
