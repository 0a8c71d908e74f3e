"""Scoring answers: metrics, held-out questions, results of a run, and the quality of merged models."""
