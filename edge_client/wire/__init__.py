"""The contract with the server: messages, topics and blobs. No sockets, no clock, no files."""
