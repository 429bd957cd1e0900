"""L4: a plan as running processes: the schedule, the stages, their links, and who starts and watches them."""
