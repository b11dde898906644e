//! Figures as SVG, and their data as CSV. What is shown is decided by whoever calls.

use std::fmt::Display;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::chart::{ChartBuilder, SeriesLabelPosition};
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::{
    BLACK, Circle, IntoDrawingArea, IntoLogRange, LineSeries, Palette, Palette99, PathElement, Rectangle, SVGBackend,
    WHITE,
};
use plotters::style::Color;

const SIZE: (u32, u32) = (900, 560);

/// One line of a figure.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Writes a figure of lines; both axes are logarithmic.
pub(super) fn lines(path: &Path, title: &str, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points).copied();
    let range = |of: fn((f64, f64)) -> f64| {
        let values = points().map(of).filter(|value| *value > 0.0);
        let (low, high) = values.fold((f64::MAX, 0.0_f64), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        if high > 0.0 { low * 0.8..high * 1.25 } else { 1.0..10.0 }
    };
    let (x, y) = (range(|point| point.0), range(|point| point.1));
    draw(path, title, x.log_scale(), y.log_scale(), lines)
}

fn draw<X, Y>(path: &Path, title: &str, x: X, y: Y, lines: &[Line]) -> Result<()>
where
    X: AsRangedCoord<Value = f64, CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>>,
{
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|error| refused(path, &error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(72)
        .build_cartesian_2d(x, y)
        .map_err(|error| refused(path, &error))?;
    chart.configure_mesh().draw().map_err(|error| refused(path, &error))?;
    for (number, line) in lines.iter().enumerate() {
        let colour = Palette99::pick(number).to_rgba();
        let points = line
            .points
            .iter()
            .copied()
            .filter(|point| point.0 > 0.0 && point.1 > 0.0);
        chart
            .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))
            .map_err(|error| refused(path, &error))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart
            .draw_series(points.map(|point| Circle::new(point, 3, colour.filled())))
            .map_err(|error| refused(path, &error))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
        .map_err(|error| refused(path, &error))?;
    area.present().map_err(|error| refused(path, &error))
}

/// Writes a figure of bars, one for each name, and a line at `mark`.
pub(super) fn bars(path: &Path, title: &str, mark: f64, bars: &[(String, f64)]) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|error| refused(path, &error))?;
    let high = bars.iter().map(|bar| bar.1).fold(mark, f64::max) * 1.1;
    let names: Vec<_> = bars.iter().map(|bar| bar.0.as_str()).collect();
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(210)
        .build_cartesian_2d(0.0..high, 0.0..bars.len().max(1) as f64)
        .map_err(|error| refused(path, &error))?;
    let name_at = |at: &f64| {
        let found = names
            .iter()
            .zip(0_u32..)
            .find(|(_, index)| (f64::from(*index) + 0.5 - at).abs() < 0.01);
        found.map_or_else(String::new, |(name, _)| (*name).to_owned())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(2 * bars.len() + 1)
        .y_label_formatter(&name_at)
        .draw()
        .map_err(|error| refused(path, &error))?;
    let boxes = bars.iter().zip(0_u32..).map(|((_, value), index)| {
        let bottom = f64::from(index);
        Rectangle::new(
            [(0.0, bottom + 0.15), (*value, bottom + 0.85)],
            Palette99::pick(0).filled(),
        )
    });
    chart.draw_series(boxes).map_err(|error| refused(path, &error))?;
    let line = [(mark, 0.0), (mark, bars.len() as f64)];
    chart
        .draw_series(LineSeries::new(line, BLACK.stroke_width(2)))
        .map_err(|error| refused(path, &error))?;
    area.present().map_err(|error| refused(path, &error))
}

fn refused(path: &Path, error: &dyn Display) -> anyhow::Error {
    anyhow!("can't draw {}: {error}", path.display())
}

/// A table for other programs.
pub(super) struct Sheet {
    columns: usize,
    text: String,
}

impl Sheet {
    pub(super) fn new(columns: &[&str]) -> Self {
        Self {
            columns: columns.len(),
            text: columns.join(",") + "\n",
        }
    }

    /// Adds a row. No value has a comma.
    pub(super) fn row(&mut self, values: impl Iterator<Item = String>) {
        let values: Vec<_> = values.collect();
        assert_eq!(values.len(), self.columns, "a value for each column");
        self.text.push_str(&values.join(","));
        self.text.push('\n');
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, &self.text).with_context(|| format!("can't write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_whole_whatever_is_in_them() {
        let folder = tempfile::tempdir().unwrap();
        let line = |points: &[(f64, f64)]| Line {
            name: "a < b".to_owned(),
            points: points.to_vec(),
        };
        for (number, shown) in [
            vec![],
            vec![line(&[])],
            vec![line(&[(100.0, 3.0), (1e4, 0.0), (5e4, 70.0)])],
        ]
        .into_iter()
        .enumerate()
        {
            let path = folder.path().join(format!("{number}.svg"));
            lines(&path, "A figure", &shown).unwrap();
            let text = fs::read_to_string(path).unwrap();
            assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>") && text.contains("A figure"));
            assert!(!text.contains("a < b"));
        }
        let path = folder.path().join("bars.svg");
        bars(&path, "Bars", 0.9, &[("one".to_owned(), 0.5), ("two".to_owned(), 1.5)]).unwrap();
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains("one") && text.contains("two"), "{text}");
        assert!(lines(&folder.path().join("no/where.svg"), "x", &[]).is_err());
    }

    #[test]
    fn a_sheet_has_a_value_in_each_column() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.csv");
        let mut sheet = Sheet::new(&["a", "b"]);
        sheet.row(["1".to_owned(), "2".to_owned()].into_iter());
        sheet.write(&path).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "a,b\n1,2\n");
    }
}
