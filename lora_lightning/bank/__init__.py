"""`AdapterBank`: another adapter for every item of a batch."""
