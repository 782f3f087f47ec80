//! Any bytes as the record of a machine whose broker is gone; what is believed is written back the same.
#![no_main]

use bulkhead::vm::record::Record;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(record) = Record::decode(data) {
        let again = Record::decode(&record.encode().unwrap()).unwrap();
        assert_eq!(again, record);
    }
});
