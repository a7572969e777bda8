"""Temperature heads: small networks that read a model's hidden state and give a temperature."""
