// First 16 hex digits of the sha256 of schema.def, in each library of FastCache.
extern "C" __attribute__((visibility("default"))) const char* fastcache_schema_digest() {
  return FASTCACHE_SCHEMA_DIGEST;
}
