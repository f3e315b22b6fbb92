"""The privileged part of an update: it believes the federation's signature, and nothing that the client says."""
