//! Sets of completion indexes, in the form in which a Job's status and its success policy write them: `1,3-5,7`.

use std::collections::BTreeSet;
use std::fmt;

/// Completion indexes, each below the Job's completions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indexes(BTreeSet<i32>);

impl Indexes {
    /// The indexes below `end` that the text names. Parts that are no index or interval name none: the text was checked
    /// when it was written.
    pub fn parse(text: &str, end: i32) -> Self {
        let mut indexes = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            if let (Ok(first), Ok(last)) = (first.parse::<i32>(), last.parse::<i32>()) {
                indexes.extend(first.max(0)..=last.min(end - 1));
            }
        }
        Self(indexes)
    }

    pub fn insert(&mut self, index: i32) {
        self.0.insert(index);
    }

    pub fn contains(&self, index: i32) -> bool {
        self.0.contains(&index)
    }

    pub fn contains_all(&self, others: &Indexes) -> bool {
        others.0.is_subset(&self.0)
    }

    /// How many of the indexes are in both sets.
    pub fn shared(&self, others: &Indexes) -> i32 {
        count(self.0.intersection(&others.0).count())
    }

    pub fn len(&self) -> i32 {
        count(self.0.len())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

impl fmt::Display for Indexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if_eq(&(last + 1)) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            match last - first {
                0 => {}
                1 => write!(f, ",{last}")?,
                _ => write!(f, "-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn intervals_are_written_from_three_on() {
        for (text, expected) in [
            ("", ""),
            ("0", "0"),
            ("0,1", "0,1"),
            ("0-1,3", "0,1,3"),
            ("1,3,4,5,7", "1,3-5,7"),
            ("0-99", "0-9"),
            ("x,2", "2"),
            ("-1,4", "4"),
        ] {
            assert_eq!(Indexes::parse(text, 10).to_string(), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(set in proptest::collection::btree_set(0..60_i32, 0..40)) {
            let indexes = Indexes(set);
            prop_assert_eq!(Indexes::parse(&indexes.to_string(), 60), indexes);
        }

        #[test]
        fn any_text_is_read_without_harm(text in "[-0-9,x ]{0,40}") {
            let read = Indexes::parse(&text, 50);
            prop_assert!(read.0.iter().all(|index| (0..50).contains(index)));
        }
    }
}
