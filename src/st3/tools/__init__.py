"""What is built on the core: commands, benchmarks, evaluation, pictures, serving. The core imports
none of it."""
