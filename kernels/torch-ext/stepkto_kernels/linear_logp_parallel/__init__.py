"""linear_logp for a head whose vocabulary is sharded over ranks. See README.md."""
