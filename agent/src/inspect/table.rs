//! Tables and colours of a terminal.

use std::io::{self, IsTerminal, Write};

use clap::builder::styling::{AnsiColor, Effects, Style};

/// What a cell says beyond its text. Shown as a colour, and only where there is a person to see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tone {
    #[default]
    Plain,
    Heading,
    Good,
    Warning,
    Bad,
    Faint,
}

impl Tone {
    fn style(self) -> Style {
        match self {
            Tone::Plain => Style::new(),
            Tone::Heading => Style::new().effects(Effects::BOLD),
            Tone::Good => AnsiColor::Green.on_default(),
            Tone::Warning => AnsiColor::Yellow.on_default(),
            Tone::Bad => AnsiColor::Red.on_default(),
            Tone::Faint => Style::new().effects(Effects::DIMMED),
        }
    }
}

/// Where text goes, in colours or not.
pub struct Screen<W> {
    out: W,
    colours: bool,
}

impl Screen<io::BufWriter<io::Stdout>> {
    /// Standard output: in colours when it is a terminal and `NO_COLOR` is not set (https://no-color.org).
    pub fn stdout() -> Self {
        let colours = io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self::new(io::BufWriter::new(io::stdout()), colours)
    }
}

impl<W: Write> Screen<W> {
    pub fn new(out: W, colours: bool) -> Self {
        Self { out, colours }
    }

    pub fn write(&mut self, text: &str, tone: Tone) -> io::Result<()> {
        if self.colours && tone != Tone::Plain {
            let style = tone.style();
            write!(self.out, "{style}{text}{style:#}")
        } else {
            self.out.write_all(text.as_bytes())
        }
    }

    pub fn line(&mut self, text: &str, tone: Tone) -> io::Result<()> {
        self.write(text, tone)?;
        self.out.write_all(b"\n")
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    pub fn into_inner(self) -> W {
        self.out
    }
}

/// One cell of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub fn new(text: impl Into<String>, tone: Tone) -> Self {
        let mut text = text.into();
        if text.is_empty() {
            text.push('-');
        }
        Self { text, tone }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Tone::Plain)
    }
}

/// Rows that are held back until the widths of their columns are known: short tables are aligned throughout, and long
/// ones by their beginning, so that they are printed as they come.
pub struct Table<const N: usize> {
    widths: [usize; N],
    held: Vec<[Cell; N]>,
    flowing: bool,
    rows: u64,
}

/// Rows by which the columns of a long table are laid out.
const LAYOUT_ROWS: usize = 500;
const GAP: &str = "   ";

impl<const N: usize> Table<N> {
    pub fn new(headings: [&str; N]) -> Self {
        let mut table = Self {
            widths: [0; N],
            held: Vec::new(),
            flowing: false,
            rows: 0,
        };
        table.hold(headings.map(|text| Cell::new(text, Tone::Heading)));
        table
    }

    fn hold(&mut self, row: [Cell; N]) {
        for (width, cell) in self.widths.iter_mut().zip(&row) {
            *width = (*width).max(cell.text.chars().count());
        }
        self.held.push(row);
    }

    pub fn row<W: Write>(&mut self, screen: &mut Screen<W>, row: [Cell; N]) -> io::Result<()> {
        self.rows += 1;
        if self.flowing {
            return print(screen, &self.widths, &row);
        }
        self.hold(row);
        if self.held.len() > LAYOUT_ROWS {
            self.release(screen)?;
        }
        Ok(())
    }

    fn release<W: Write>(&mut self, screen: &mut Screen<W>) -> io::Result<()> {
        self.flowing = true;
        for row in std::mem::take(&mut self.held) {
            print(screen, &self.widths, &row)?;
        }
        Ok(())
    }

    /// Prints what is held back, and says how many rows there were.
    pub fn finish<W: Write>(mut self, screen: &mut Screen<W>) -> io::Result<u64> {
        if self.rows > 0 && !self.flowing {
            self.release(screen)?;
        }
        screen.flush()?;
        Ok(self.rows)
    }
}

fn print<const N: usize, W: Write>(
    screen: &mut Screen<W>,
    widths: &[usize; N],
    row: &[Cell; N],
) -> io::Result<()> {
    for (index, cell) in row.iter().enumerate() {
        screen.write(&cell.text, cell.tone)?;
        if index + 1 < N {
            let missing = widths[index].saturating_sub(cell.text.chars().count());
            screen.write(&" ".repeat(missing), Tone::Plain)?;
            screen.write(GAP, Tone::Plain)?;
        }
    }
    screen.write("\n", Tone::Plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(rows: usize, colours: bool) -> String {
        let mut screen = Screen::new(Vec::new(), colours);
        let mut table = Table::new(["NAME", "STATE"]);
        for index in 0..rows {
            let name = if index == 0 { "a-long-name" } else { "b" };
            table
                .row(&mut screen, [name.into(), Cell::new("", Tone::Good)])
                .unwrap();
        }
        assert_eq!(table.finish(&mut screen).unwrap(), rows as u64);
        String::from_utf8(screen.into_inner()).unwrap()
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_blanks() {
        assert_eq!(
            printed(2, false),
            "NAME          STATE\na-long-name   -\nb             -\n"
        );
    }

    #[test]
    fn an_empty_table_has_no_headings() {
        assert_eq!(printed(0, false), "");
    }

    #[test]
    fn a_long_table_is_printed_as_it_comes_and_complete() {
        let text = printed(3 * LAYOUT_ROWS, false);
        assert_eq!(text.lines().count(), 3 * LAYOUT_ROWS + 1);
        assert!(text.lines().all(|line| line.find(['-', 'S']).is_some()));
    }

    #[test]
    fn colours_change_nothing_but_colours() {
        let coloured = printed(1, true);
        assert!(coloured.contains("\u{1b}[32m-\u{1b}[0m"), "{coloured:?}");
        assert!(
            coloured.contains("\u{1b}[1mNAME\u{1b}[0m          "),
            "{coloured:?}"
        );
        assert!(!printed(1, false).contains('\u{1b}'));
    }
}
