"""The models on which Django's documentation explains its queries, as far as these need them."""
