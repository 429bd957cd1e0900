"""Why a plan is as it is, what could be different, and what would make one possible."""
