"""Knowledge that travels: logits, the public set they belong to, and how they are combined."""
