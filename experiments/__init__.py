"""Claims, benchmarks and checks of the world; README.md here says what was found."""
