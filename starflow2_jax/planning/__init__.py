"""What a config costs on a named accelerator topology, by its compiler."""
