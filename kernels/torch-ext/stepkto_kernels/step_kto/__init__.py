"""The Step-KTO objective over packed tokens. See README.md."""
