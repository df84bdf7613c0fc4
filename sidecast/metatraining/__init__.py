"""Trains nowcasters on the trajectories of many small models."""
