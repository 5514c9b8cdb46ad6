"""PostgreSQL: the list of documents, tenants and usage; a server of one's own where there is none."""
