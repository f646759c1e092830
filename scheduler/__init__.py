"""The planner: pure functions from profiles and scores to placements, selections and step programs."""
