"""OpenAI's API over HTTP, as a client of the cell: it holds nothing that matters, and several may run."""
