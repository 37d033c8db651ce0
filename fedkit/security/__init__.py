"""Who may talk to whom, and how nobody else listens: certificates, TLS, join tokens."""
