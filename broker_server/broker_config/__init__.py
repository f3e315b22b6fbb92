"""Configuration for brokers, written: TLS, certificates as user names, access rules, limits that lose nothing."""
