"""Frozen base models for training: what `idcore.training.contract.Base` asks for."""
