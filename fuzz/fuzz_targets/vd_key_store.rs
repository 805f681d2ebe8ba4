//! Key stores of encrypted media: whatever the text in a settings file, reading it does not panic, and what is taken comes back as it was.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(store) = vd::KeyStore::decode(text) {
        assert_eq!(vd::KeyStore::decode(&store.encode()), Ok(store));
    }
});
