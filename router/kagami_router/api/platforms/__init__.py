"""SageMaker, Vertex AI and KServe."""
