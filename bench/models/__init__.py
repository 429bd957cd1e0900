"""Models that measurements need and that no package of the project brings along."""
