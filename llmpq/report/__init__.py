"""L9: what a person sees: tables on the terminal, figures, the HTML page, traces."""
