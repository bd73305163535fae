"""The driver: plan - ledger -> executor -> ledger, its policies, and the executor that needs no cluster."""
