"""Who got what: the table of priorities, quotas and counts. Numbers only."""
