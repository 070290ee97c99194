"""What ``arrattn compare`` runs: a real model, four families, one table."""
