"""How a fact is named, carried and kept: messages, subjects, ledger, client library."""
