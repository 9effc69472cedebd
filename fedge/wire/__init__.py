"""The wire: protobuf messages, their limits, and the encoding of values. No sockets here."""
